select job_id, token, endpoint, external_id, sent_seconds, state, worker, was_claimed, cancel_requested, payload
from brightrun.dispatch_take($1, make_interval(secs => $2))
