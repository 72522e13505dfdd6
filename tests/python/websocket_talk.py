"""A WebSocket, both ends: a server that sends back what it gets, and a client that sends texts, bytes and pings.

websocket_talk.py serve HOST PORT
websocket_talk.py call HOST PORT WORD COUNT
"""

import sys

from websockets.sync.client import connect
from websockets.sync.server import serve


def echo(socket):
    for message in socket:
        socket.send(message)


act, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
if act == "serve":
    with serve(echo, host, port) as server:
        server.serve_forever()
else:
    word, count = sys.argv[4], int(sys.argv[5])
    with connect(f"ws://{host}:{port}/orders", compression=None, open_timeout=20) as socket:
        for number in range(count):
            socket.send(f"{word} {number}")
            assert socket.recv(timeout=20) == f"{word} {number}"
        big = bytes(range(256)) * 2000
        socket.send(big)
        assert socket.recv(timeout=20) == big
        assert socket.ping().wait(20), "no pong"
    print("took back", count + 1)
