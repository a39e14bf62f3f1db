begin;
set local lock_timeout = '30s';
select pg_advisory_xact_lock(4702111234474983745);
