select job_id, batons from brightrun.violations()
