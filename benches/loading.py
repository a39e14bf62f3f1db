#!/usr/bin/env python3
"""Loading a synthetic FP8 checkpoint: load + quantise + snapshot, and load from the snapshot, beside a plain sequential read.

Everything runs on one disk in one session; as root the page cache is dropped before every measurement. The plain read is the best of
a buffered and an unbuffered (O_DIRECT) pass over the same bytes with 8 MiB requests, one thread. Needs no package.

    python3 benches/loading.py --brightrun target/release/brightrun --work DIR --layers 2 --rounds 3
"""

import argparse
import glob
import json
import mmap
import os
import platform
import resource
import shutil
import subprocess
import time

REQUEST = 8 << 20
LOADS = ("load_without_snapshot", "load_and_write_snapshot", "load_from_snapshot")


def drop_caches():
    """Writes back and forgets cached pages; whether that was possible."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
        return True
    except OSError:
        return False


def plain_read(paths, direct):
    """Seconds to read whole files one after another; None where O_DIRECT is refused."""
    drop_caches()
    buffer = mmap.mmap(-1, REQUEST)
    began = time.perf_counter()
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        except OSError:
            return None
        try:
            while os.readv(handle, [buffer]) > 0:
                pass
        except OSError:
            # The unaligned tail of a file, where the file system wants aligned lengths.
            return None
        finally:
            os.close(handle)
    return time.perf_counter() - began


def best_plain_read(paths):
    passes = {"buffered": plain_read(paths, False), "direct": plain_read(paths, True)}
    passes = {name: seconds for name, seconds in passes.items() if seconds}
    name = min(passes, key=passes.get)
    return {"seconds": passes[name], "how": name, "all": passes}


def build(arguments, folder, *flags):
    """One run of `brightrun snapshot build` with a cold cache."""
    dropped = drop_caches()
    device = ["--device", arguments.device] if arguments.device else []
    command = [arguments.brightrun, *device, "snapshot", "build", "--model", folder, "--base-dtype", arguments.base_dtype, "--json", *flags]
    before = os.getloadavg()[0]
    began = time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(output)
    report["process_seconds"] = time.perf_counter() - began
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    report["processor_seconds"] = {"user": now.ru_utime - used.ru_utime, "system": now.ru_stime - used.ru_stime}
    report["load_average_before"] = before
    report["cache_dropped"] = dropped
    return report


def one_round(arguments, folder):
    shards = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    shutil.rmtree(os.path.join(folder, ".brightrun"), ignore_errors=True)
    checkpoint_read = best_plain_read(shards)
    without = build(arguments, folder, "--without-snapshot")
    first = build(arguments, folder)
    snapshot = glob.glob(os.path.join(folder, ".brightrun", "*.snapshot"))
    snapshot_read = best_plain_read(snapshot)
    second = build(arguments, folder)
    assert first["source"] == "checkpoint" and second["source"] == "snapshot", (first, second)
    assert first["fingerprint"] == second["fingerprint"] == without["fingerprint"]
    return {
        "checkpoint_bytes": sum(map(os.path.getsize, shards)),
        "snapshot_bytes": sum(map(os.path.getsize, snapshot)),
        "plain_read_of_checkpoint": checkpoint_read,
        "plain_read_of_snapshot": snapshot_read,
        "load_without_snapshot": without,
        "load_and_write_snapshot": first,
        "load_from_snapshot": second,
        "share_of_plain_read": {
            "load_without_snapshot": checkpoint_read["seconds"] / without["seconds"],
            "load_and_write_snapshot": checkpoint_read["seconds"] / first["seconds"],
            "load_from_snapshot": snapshot_read["seconds"] / second["seconds"],
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brightrun", required=True, help="the binary")
    parser.add_argument("--device", help="what weights are loaded to; the program's own choice without it")
    parser.add_argument("--work", required=True, help="a folder on the disk to measure; the checkpoint in it is made and removed")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base-dtype", default="nf4", choices=["nf4", "nf4-experts"])
    parser.add_argument("--out", help="file for the raw results (JSON)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint where it is")
    arguments = parser.parse_args()
    folder = os.path.join(arguments.work, "synthetic-fp8")
    command = [arguments.brightrun, "synth", "qwen3-next-80b-a3b", "--layers", str(arguments.layers)]
    command += ["--dtype", "fp8", "--out", folder, "--json"]
    synthesis = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    synthesis.pop("out", None)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "base_dtype": arguments.base_dtype,
        "layers": arguments.layers,
        "synthesis": synthesis,
        "rounds": [one_round(arguments, folder) for _ in range(arguments.rounds)],
    }
    for entry in result["rounds"]:
        for key in LOADS:
            # A path of this machine has no place in a recorded result.
            entry[key].pop("snapshot", None)
    text = json.dumps(result, indent=1)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(text + "\n")
    for number, entry in enumerate(result["rounds"]):
        shares = {name: round(share, 3) for name, share in entry["share_of_plain_read"].items()}
        peak = entry["load_from_snapshot"]["peak_resident_bytes"], entry["load_and_write_snapshot"]["peak_resident_bytes"]
        processor = {key: round(sum(entry[key]["processor_seconds"].values()), 1) for key in LOADS}
        print(f"round {number + 1}: {shares}, processor seconds {processor}, peak from snapshot {peak[0]}, while quantising {peak[1]}")
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
