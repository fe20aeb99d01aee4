"""Time and memory of demur against dense implementations. Run from a checkout: `python -m perf.attribution`."""
