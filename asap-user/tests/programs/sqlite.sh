# needs: /usr/bin/sqlite3 (sqlite3)
cat > script.sql <<'END'
create table t(id integer primary key, name text, value real);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 20000)
insert into t select i, 'name' || (i * 7919 % 1009), i * 0.5 from n;
create index ti on t(name);
select count(*), sum(value), min(name), max(name) from t;
select name, count(*) c from t group by name order by c desc, name limit 3;
select a.id from t a join t b on a.id = b.id + 19990 order by 1 limit 3;
begin; delete from t where id % 3 = 0; rollback; select count(*) from t;
update t set value = value * 2 where name like 'name1%'; select total(value) from t;
select group_concat(upper(substr(name, 1, 6)), ',') from (select name from t order by id limit 4);
with recursive f(a, b, n) as (select 0, 1, 0 union all select b, a + b, n + 1 from f where n < 60) select max(a) from f;
select json_extract('{"a":[1,2,3]}', '$.a[2]'), printf('%.3f', 2.0 / 3);
pragma integrity_check;
END
$RUN sqlite3 :memory: < script.sql
$RUN sqlite3 file.db < script.sql && $RUN sqlite3 file.db 'select count(*) from t; select nothing;' 2>/dev/null || echo "ended with $?"
