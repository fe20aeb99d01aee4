"""How the files that demur ships were made. Not part of the installed package: run from a checkout."""
