listen brightrun_ready; listen brightrun_cancel;
