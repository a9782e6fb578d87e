"""What is measured, an operation a file: its contenders, its counted work, its error."""
