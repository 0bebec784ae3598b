"""Serves DynamoDB, S3 and SQS on a free port of 127.0.0.1, with ministack.

The port is the first line of the output. It ends when its standard input does, so that it cannot outlive the process
that started it, however that one ends.
"""

import asyncio
import os
import socket
import sys
import threading

listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
port = listener.getsockname()[1]
# Read as soon as it is imported.
os.environ.update(GATEWAY_PORT=str(port), SERVICES="dynamodb,s3,sqs", LOG_LEVEL="WARNING")

from hypercorn.asyncio import serve  # noqa: E402
from hypercorn.config import Config  # noqa: E402
from ministack.app import app  # noqa: E402


def end_with_input():
    sys.stdin.buffer.read()
    os._exit(0)


threading.Thread(target=end_with_input, daemon=True).start()
config = Config()
config.bind = [f"fd://{listener.detach()}"]
config.keep_alive_timeout = 75
config.loglevel = "WARNING"
print(port, flush=True)
asyncio.run(serve(app, config))
