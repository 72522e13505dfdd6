"""A visitor of the shop: orders something and looks at the orders, again and again, through the agent that wraps it.
A path written to /run/visitor/next is visited once more, which is how the demo lets the visitor try something nasty."""

import json
import sys
import time
import urllib.request

SHOP = "http://127.0.0.1:8081"
NEXT = "/run/visitor/next"


def call(path, value=None):
    data = json.dumps(value).encode() if value else None
    with urllib.request.urlopen(urllib.request.Request(SHOP + path, data=data), timeout=5) as answer:
        return answer.read().decode()


def wish():
    try:
        with open(NEXT, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def main():
    working, done, visits = None, wish(), 0
    while True:
        try:
            if (path := wish()) and path != done:
                print("visited", path, "->", call(path), flush=True)
                done = path
            if visits % 10 == 0:
                call("/orders", {"item": "tea", "amount": 1 + visits % 5})
            call("/orders")
            visits += 1
            if working is not True:
                working = True
                print("the shop answers", flush=True)
        except OSError as error:
            if working is not False:
                working = False
                print("the shop does not answer:", error, file=sys.stderr, flush=True)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
