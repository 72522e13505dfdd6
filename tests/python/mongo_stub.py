"""As much of MongoDB's wire protocol as pymongo needs to insert and find: a server is not to be had from Debian.

Replies as a server of wire version 17 does, to OP_QUERY (only the first hello) and OP_MSG.

mongo_stub.py HOST PORT
"""

import socketserver
import struct
import sys

import bson

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013
documents = {}


def hello():
    return {
        "ismaster": True,
        "isWritablePrimary": True,
        "helloOk": True,
        "maxBsonObjectSize": 16 << 20,
        "maxMessageSizeBytes": 48 << 20,
        "maxWriteBatchSize": 100_000,
        "minWireVersion": 0,
        "maxWireVersion": 17,
        "ok": 1.0,
    }


def answer(command):
    name = next(iter(command))
    if name.lower() in ("hello", "ismaster"):
        return hello()
    if name == "insert":
        documents.setdefault(command["insert"], []).extend(command["documents"])
        return {"n": len(command["documents"]), "ok": 1.0}
    if name == "find":
        wanted = command.get("filter", {})
        kept = documents.get(command["find"], [])
        found = [d for d in kept if all(d.get(key) == value for key, value in wanted.items())]
        return {"cursor": {"firstBatch": found, "id": 0, "ns": f"{command['$db']}.{command['find']}"}, "ok": 1.0}
    if name in ("ping", "endSessions"):
        return {"ok": 1.0}
    return {"ok": 0.0, "errmsg": f"no such command: {name}", "code": 59, "codeName": "CommandNotFound"}


def read_message(body):
    """The command of an OP_MSG: the document of section 0, with those of each section 1 put in by their name."""
    at, command = 4, {}
    while at < len(body):
        kind, at = body[at], at + 1
        if kind == 0:
            size = struct.unpack_from("<i", body, at)[0]
            command = {**bson.decode(body[at : at + size]), **command}
            at += size
            continue
        end = at + struct.unpack_from("<i", body, at)[0]
        name_end = body.index(b"\0", at + 4)
        name, at = body[at + 4 : name_end].decode(), name_end + 1
        command[name] = bson.decode_all(body[at:end])
        at = end
    # The command's own name has to come first.
    first = next((k for k in command if k in ("insert", "find")), None)
    return {first: command[first], **command} if first else command


class Client(socketserver.StreamRequestHandler):
    def handle(self):
        while head := self.rfile.read(16):
            size, request, _, code = struct.unpack("<iiii", head)
            body = self.rfile.read(size - 16)
            if code == OP_QUERY:
                reply = struct.pack("<iqii", 8, 0, 0, 1) + bson.encode(hello())
                self.send(OP_REPLY, request, reply)
            elif code == OP_MSG:
                self.send(OP_MSG, request, struct.pack("<IB", 0, 0) + bson.encode(answer(read_message(body))))

    def send(self, code, to, body):
        self.wfile.write(struct.pack("<iiii", 16 + len(body), 1, to, code) + body)
        self.wfile.flush()


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads = True, True


with Server((sys.argv[1], int(sys.argv[2])), Client) as server:
    server.serve_forever()
