"""MongoDB through pymongo: inserts documents and finds them again.

mongo_talk.py HOST PORT WORD COUNT
"""

import sys

from pymongo import MongoClient

host, port, word, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with MongoClient(host, port, directConnection=True, serverSelectionTimeoutMS=20_000) as client:
    orders = client.shop.orders
    orders.insert_many([{"number": n, "text": f"{word} {n}"} for n in range(count)])
    found = list(orders.find())
    assert [d["text"] for d in found] == [f"{word} {n}" for n in range(count)], found
    assert orders.find_one({"number": 7})["text"] == f"{word} 7"
print("took back", len(found))
