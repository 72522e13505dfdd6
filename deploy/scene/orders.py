"""The shop's order service: JSON over plain HTTP, orders in MariaDB. It knows nothing of TLS: it listens on its own
loopback, finds its database there too, and the agents beside it do the rest.

  GET  /orders             the last orders
  POST /orders             {"item": "tea", "amount": 2}
  GET  /export?name=NAME   a daily export; holds the demo's deliberate hole: NAME reaches a shell
"""

import json
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pymysql


def database():
    return pymysql.connect(host="127.0.0.1", port=3306, user="orders", password="", database="shop", autocommit=True)


def last_orders():
    with database() as db, db.cursor() as cursor:
        cursor.execute("SELECT id, item, amount FROM orders ORDER BY id DESC LIMIT 10")
        return [{"id": id, "item": item, "amount": amount} for id, item, amount in cursor.fetchall()]


def add_order(item, amount):
    with database() as db, db.cursor() as cursor:
        cursor.execute("INSERT INTO orders (item, amount) VALUES (%s, %s)", (item, amount))
        return {"id": cursor.lastrowid}


def export(name):
    # The hole. A name like `today; id` runs `id`.
    done = subprocess.run(f"echo export of {name}", shell=True, capture_output=True, text=True, timeout=10)
    return {"export": done.stdout}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path == "/orders":
            self.answer(last_orders)
        elif url.path == "/export":
            self.answer(lambda: export(parse_qs(url.query).get("name", ["today"])[0]))
        else:
            self.reply(404, {"error": "no such page"})

    def do_POST(self):
        order = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.answer(lambda: add_order(str(order["item"]), int(order["amount"])))

    def answer(self, work):
        try:
            self.reply(200, work())
        except (pymysql.MySQLError, OSError) as error:
            self.reply(503, {"error": str(error)})

    def reply(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
