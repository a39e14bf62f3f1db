select job_id, owner, payload, attempt from brightrun.dispatch_waiting($1, $2, $3)
