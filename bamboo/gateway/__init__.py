"""The WebSocket gateway: `listener` accepts and admits, `connection` reads and writes, `requests` answers, `outbox`
keeps the order.
"""
