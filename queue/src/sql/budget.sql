select budget::float8, period, since, spent::float8 from brightrun.budget($1)
