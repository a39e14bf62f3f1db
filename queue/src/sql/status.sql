select id, kind, queue, priority, payload, owner, idempotency_key, external_id, state, attempt, max_attempts, claims,
       created_at, run_at, started_at, finished_at, cancel_requested_at, cancel_reason, result, error, progress, worker,
       extract(epoch from expires_at - brightrun.now())::float8 as lease_seconds
from brightrun.status($1)
