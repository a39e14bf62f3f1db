-- A user, as Supabase's sign-up creates one. $1 user id (uuid)
insert into auth.users (id, email) values ($1::uuid, 'demo@example.invalid') on conflict (id) do nothing;
