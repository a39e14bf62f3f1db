"""Replaces itself by the worker, which keeps arguments, signals and exit code. Only `runpodctl project` and the Hub need this file."""

import os
import sys

os.execvp("brightrun", ["brightrun", "worker", *sys.argv[1:]])
