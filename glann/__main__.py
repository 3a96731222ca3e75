"""`python -m glann` is the command `glann`."""

from glann.cli import main

main()
