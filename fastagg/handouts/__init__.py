"""What clients are handed: the choices, their targets, and the writing of them."""
