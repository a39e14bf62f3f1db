select lane, ready, scheduled, running, expired, dead from brightrun.brief_stats()
