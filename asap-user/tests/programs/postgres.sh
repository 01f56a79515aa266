# needs: /usr/lib/postgresql/15/bin/postgres (postgresql-15)
# slow
# Does not run as root: $RUN_AS_NOBODY is $RUN for the user nobody.
at=/usr/lib/postgresql/15/bin; chmod 755 .; mkdir data; chown nobody data
as() { setpriv --reuid nobody --clear-groups --regid nogroup "$@"; }
as $at/initdb -D data -A trust -U nobody --no-sync > init.log
$RUN_AS_NOBODY $at/postgres -D data -c listen_addresses=127.0.0.1 -c port="$PORT" -c unix_socket_directories= -c fsync=off -c jit=off > log 2>&1 & server=$!
sql() { $at/psql -h 127.0.0.1 -p "$PORT" -U nobody -d postgres -Atq "$@"; }
until sql -c 'select 1' > /dev/null 2>&1; do kill -0 $server; sleep 0.2; done
sql <<'END'
create table t(id int primary key, name text, value numeric);
insert into t select i, 'name' || (i * 7919 % 1009), i * 0.5 from generate_series(1, 20000) i;
create index on t(name); analyze t;
select count(*), sum(value), min(name), max(name) from t;
select name, count(*) from t group by 1 order by 2 desc, 1 limit 3;
create function f(n int) returns int language plpgsql as $$ begin if n < 2 then return n; end if; return f(n - 1) + f(n - 2); end $$;
select f(15);
begin; delete from t; rollback; select count(*) from t;
select regexp_replace('me@here', '(\w+)@(\w+)', '\2 at \1'), to_char(timestamp '2020-02-29 12:00', 'Day DD Mon'), 2 ^ 0.5;
do $$ begin perform 1 / 0; exception when division_by_zero then raise notice 'caught'; end $$;
vacuum t; select md5(string_agg(name, ',' order by id)) from t;
END
for i in 1 2 3 4 5 6; do sql -c "update t set value = value + 1 where id % 7 = $i" & pids="${pids:-} $!"; done; wait $pids
sql -c 'select sum(value) from t'
kill -INT $server; wait $server; echo "ended with $?"
