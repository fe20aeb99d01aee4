"""`python -m demur.bundled`: build or evaluate the bundled model."""

from demur.bundled import app

app()
