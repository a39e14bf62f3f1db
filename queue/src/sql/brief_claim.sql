select token, lease_seconds, last_seq, ids, attempts, payloads
from brightrun.brief_claim($1, $2, $3, make_interval(secs => $4), $5)
