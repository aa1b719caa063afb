"""Copies the test executables that cargo names on standard input (--message-format=json) to a directory."""
import json
import pathlib
import shutil
import sys

to = pathlib.Path(sys.argv[1])
for line in sys.stdin:
    try:
        message = json.loads(line)
    except ValueError:
        continue
    if message.get("reason") == "compiler-artifact" and message.get("executable") and message["profile"]["test"]:
        shutil.copy(message["executable"], to / message["target"]["name"])
        print(to / message["target"]["name"])
