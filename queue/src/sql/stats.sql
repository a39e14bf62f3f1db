select queue, kind, ready, scheduled, running, expired, oldest_ready_seconds from brightrun.stats()
