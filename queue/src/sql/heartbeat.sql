select job_id, token, reply, lease_seconds, reason
from brightrun.heartbeat($1, $2, $3)
