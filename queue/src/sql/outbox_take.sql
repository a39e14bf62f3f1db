select id, token, topic, key, payload, attempts, created_at
from brightrun.outbox_take($1, $2, make_interval(secs => $3))
order by id
