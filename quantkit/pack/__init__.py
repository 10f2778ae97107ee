"""A checkpoint and a plan become a packed checkpoint, tensor by tensor."""
