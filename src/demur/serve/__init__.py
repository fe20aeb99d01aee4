"""A guard behind HTTP, `demur guard serve` (extra `serve`). `server.serve` runs it; `app.create_app` gives the ASGI
application to run elsewhere."""
