"""AMQP 1.0 through Qpid Proton, both ends: a server that keeps what it is sent, and a client.

amqp_talk.py serve HOST PORT          sends each message back to the client's reply address
amqp_talk.py call HOST PORT WORD COUNT
"""

import sys

from proton import Message
from proton.handlers import MessagingHandler
from proton.reactor import Container


class Server(MessagingHandler):
    def __init__(self, url):
        super().__init__()
        self.url, self.senders = url, {}

    def on_start(self, event):
        event.container.listen(self.url)

    def on_link_opening(self, event):
        if event.link.is_sender:
            event.link.source.address = event.link.source.address or "replies"
            self.senders[event.connection.container] = event.link
        else:
            event.link.target.address = event.link.remote_target.address

    def on_message(self, event):
        self.senders[event.connection.container].send(Message(body=event.message.body))


class Client(MessagingHandler):
    def __init__(self, url, word, count):
        super().__init__()
        self.url, self.word, self.count = url, word, count
        self.sent, self.got = 0, []

    def on_start(self, event):
        connection = event.container.connect(self.url, reconnect=False)
        event.container.create_receiver(connection, "replies")
        self.sender = event.container.create_sender(connection, "orders")

    def on_sendable(self, event):
        while event.sender.credit and self.sent < self.count:
            event.sender.send(Message(body=f"{self.word} {self.sent}"))
            self.sent += 1

    def on_message(self, event):
        self.got.append(event.message.body)
        if len(self.got) == self.count:
            event.connection.close()

    def on_transport_error(self, event):
        sys.exit(f"transport: {event.transport.condition}")


act, host, port = sys.argv[1], sys.argv[2], sys.argv[3]
if act == "serve":
    Container(Server(f"{host}:{port}")).run()
else:
    client = Client(f"amqp://{host}:{port}", sys.argv[4], int(sys.argv[5]))
    Container(client).run()
    assert client.got == [f"{client.word} {n}" for n in range(client.count)], client.got
    print("took back", len(client.got))
