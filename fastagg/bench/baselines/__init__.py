"""What users write today, in pure torch, with the scaling right; each on one module's lists of factors.

They are written as their users would write them, and none is slowed down: METHODS' published codes are
slower still (a deepcopy of the model a client, a file a client and layer).
"""
