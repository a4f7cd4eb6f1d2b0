"""WebSockets, and the live messages behind them."""
