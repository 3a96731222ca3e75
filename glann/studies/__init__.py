"""The claims about GLANN as experiments that anyone can run."""
