"""S3 through boto3: a small object, one in several parts, a listing, a signed URL, a deletion.

s3_talk.py HOST PORT WORD
"""

import hashlib
import sys
import urllib.request

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

host, port, word = sys.argv[1:4]
s3 = boto3.client(
    "s3",
    endpoint_url=f"http://{host}:{port}",
    region_name="us-east-1",
    aws_access_key_id="key",
    aws_secret_access_key="not-a-secret",
    config=Config(retries={"max_attempts": 1}),
)
s3.create_bucket(Bucket="orders")
s3.put_object(Bucket="orders", Key="small", Body=word.encode())
assert s3.get_object(Bucket="orders", Key="small")["Body"].read() == word.encode()

big = b"".join(hashlib.sha512(f"{word} {n}".encode()).digest() for n in range(300_000))
with open(sys.argv[4], "wb") as file:
    file.write(big)
s3.upload_file(sys.argv[4], "orders", "big", Config=TransferConfig(multipart_chunksize=6 << 20))
got = s3.get_object(Bucket="orders", Key="big")["Body"].read()
assert hashlib.sha256(got).digest() == hashlib.sha256(big).digest(), len(got)
assert sorted(o["Key"] for o in s3.list_objects_v2(Bucket="orders")["Contents"]) == ["big", "small"]

url = s3.generate_presigned_url("get_object", Params={"Bucket": "orders", "Key": "small"})
assert urllib.request.urlopen(url, timeout=20).read() == word.encode()
s3.delete_object(Bucket="orders", Key="small")
s3.close()
print("took back", len(got))
