"""STOMP 1.1 through stomp.py: sends messages to a queue and takes each of them back.

stomp_talk.py HOST PORT WORD COUNT
"""

import queue
import sys

import stomp

host, port, word, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
arrived = queue.Queue()


class Listener(stomp.ConnectionListener):
    def on_message(self, frame):
        arrived.put(frame.body)

    def on_error(self, frame):
        arrived.put("ERROR " + frame.body)


connection = stomp.Connection11([(host, port)], heartbeats=(4000, 4000))
connection.set_listener("", Listener())
connection.connect(wait=True)
connection.subscribe("/queue/orders", id="1", ack="auto")
for number in range(count):
    connection.send("/queue/orders", f"{word} {number}")
got = [arrived.get(timeout=20) for _ in range(count)]
assert got == [f"{word} {number}" for number in range(count)], got
connection.disconnect()
print("took back", len(got))
