# needs: /usr/sbin/apache2 (apache2-bin) /usr/bin/curl (curl)
chmod 755 . ; mkdir pages; head -c 287000 /bin/bash > pages/file; echo small > pages/small.html
modules=/usr/lib/apache2/modules
cat > conf <<END
ServerRoot $PWD
ServerName localhost
Listen 127.0.0.1:$PORT
PidFile $PWD/pid
ErrorLog $PWD/error.log
Mutex file:$PWD default
LoadModule mpm_worker_module $modules/mod_mpm_worker.so
LoadModule authz_core_module $modules/mod_authz_core.so
LoadModule filter_module $modules/mod_filter.so
LoadModule deflate_module $modules/mod_deflate.so
LoadModule rewrite_module $modules/mod_rewrite.so
User www-data
Group www-data
DocumentRoot $PWD/pages
<Directory $PWD/pages>
Require all granted
</Directory>
SetOutputFilter DEFLATE
RewriteEngine On
RewriteRule ^/number/([0-9]+)\$ /small.html [L]
KeepAlive On
MaxKeepAliveRequests 0
END
$RUN apache2 -DFOREGROUND -f "$PWD/conf" & server=$!
until curl -sf "http://127.0.0.1:$PORT/small.html" > /dev/null; do kill -0 $server; sleep 0.1; done
for i in 1 2 3 4 5 6 7 8 9 10; do
    curl -s "http://127.0.0.1:$PORT/file" | cksum
    curl -s --compressed "http://127.0.0.1:$PORT/file" | cksum
    curl -s -r 100-199,3000-3010 "http://127.0.0.1:$PORT/file" | grep -ci '^Content-Range' -a
    curl -s -o /dev/null -w '%{http_code}\n' "http://127.0.0.1:$PORT/nothing"
    curl -s "http://127.0.0.1:$PORT/number/$i"
done
kill -USR1 $server; sleep 1
curl -s "http://127.0.0.1:$PORT/small.html"
# It may signal its whole process group.
trap : TERM; kill -TERM $server
while kill -0 $server 2> /dev/null; do sleep 0.1 || :; done
wait $server; echo "ended with $?"
