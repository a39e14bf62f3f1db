select pg_notify('brightrun_ready', '')
