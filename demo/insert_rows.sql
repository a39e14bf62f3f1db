-- What an app does to train on a file it has uploaded to storage: two rows, one transaction.
-- $1 user id   $2 dataset id   $3 job id   $4 dataset name   $5 path in the bucket `lora-datasets`
-- $6 file name   $7 file size in bytes   $8 hyperparameters   $9 gpu_config
with dataset as (
  insert into public.datasets (id, user_id, name, format, status, storage_bucket, storage_path, file_name, file_size, training_ready)
  values ($2::uuid, $1::uuid, $4::text, 'brightrun_lora_v4', 'ready', 'lora-datasets', $5::text, $6::text, $7::bigint, true)
  returning id, user_id
)
insert into public.training_jobs
  (id, user_id, dataset_id, preset_id, hyperparameters, gpu_config, status, current_stage, progress,
   total_epochs, estimated_total_cost, current_cost, current_metrics, queued_at)
select $3::uuid, user_id, id, 'custom', $8::jsonb, $9::jsonb, 'queued', 'queued', 0,
       ($8::jsonb ->> 'epochs')::integer, 0, 0, '{}', now()
  from dataset
returning id;
