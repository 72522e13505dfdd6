"""NATS through nats-py: requests that are answered, and a subject that is published to and listened to.

nats_talk.py HOST PORT WORD COUNT
"""

import asyncio
import sys

import nats

host, port, word, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])


async def main():
    url = f"nats://{host}:{port}"
    one = await nats.connect(url, allow_reconnect=False, connect_timeout=20)
    two = await nats.connect(url, allow_reconnect=False, connect_timeout=20)

    async def answer(message):
        await message.respond(b"answer to " + message.data)

    await one.subscribe("orders", cb=answer)
    heard = await one.subscribe("news")
    await one.flush()
    for number in range(count):
        reply = await two.request("orders", f"{word} {number}".encode(), timeout=20)
        assert reply.data == f"answer to {word} {number}".encode(), reply
    for number in range(count):
        await two.publish("news", f"{word} {number}".encode())
    for number in range(count):
        message = await heard.next_msg(timeout=20)
        assert message.data == f"{word} {number}".encode(), message
    await one.drain()
    await two.drain()
    print("took back", 2 * count)


asyncio.run(main())
