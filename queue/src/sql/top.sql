select job_id, kind, queue, worker, attempt, running_seconds, beat_seconds, lease_seconds, progress from brightrun.top($1)
