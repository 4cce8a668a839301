"""`python -m astrai_rs` is the command line."""

from astrai_rs.cli import main

main()
