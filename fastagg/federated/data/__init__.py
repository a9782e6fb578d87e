"""What clients train on: examples, how they are shared out, and how they become tokens."""
