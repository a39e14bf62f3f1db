select job_id, token, kind, queue, payload, owner, external_id, attempt, max_attempts, claims, progress, checkpoint, created_at,
       lease_seconds, deadline_seconds
from brightrun.claim_job($1, $2, make_interval(secs => $3))
