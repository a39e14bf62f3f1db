select brightrun.dispatch_begin($1, $2, $3, $4::float8::numeric, $5::float8::numeric, make_interval(secs => $6))
