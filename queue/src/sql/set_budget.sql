select brightrun.set_budget($1, $2::float8::numeric, $3)
