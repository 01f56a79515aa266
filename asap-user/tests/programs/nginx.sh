# needs: /usr/sbin/nginx (nginx) /usr/bin/curl (curl)
chmod 755 . ; mkdir pages; head -c 287000 /bin/bash > pages/file; echo small > pages/small
cat > conf <<END
daemon off; user www-data; worker_processes 2; pid $PWD/pid; error_log $PWD/error.log;
events { worker_connections 256; }
http { access_log off; gzip on; gzip_types *; client_body_temp_path $PWD/body; proxy_temp_path $PWD/proxy; fastcgi_temp_path $PWD/fastcgi;
uwsgi_temp_path $PWD/uwsgi; scgi_temp_path $PWD/scgi;
server { listen 127.0.0.1:$PORT; root $PWD/pages; location /moved { return 301 /small; } location ~ ^/number/([0-9]+)\$ { return 200 "n \$1"; } } }
END
$RUN nginx -c "$PWD/conf" & server=$!
until curl -sf "http://127.0.0.1:$PORT/small" > /dev/null; do kill -0 $server; sleep 0.1; done
for i in 1 2 3 4 5 6 7 8 9 10; do
    curl -s "http://127.0.0.1:$PORT/file" | cksum
    curl -s --compressed "http://127.0.0.1:$PORT/file" | cksum
    curl -s -r 100-199,3000-3010 "http://127.0.0.1:$PORT/file" | grep -c '^Content-Range' -a
    curl -s -o /dev/null -w '%{http_code}\n' "http://127.0.0.1:$PORT/nothing"
    curl -sL "http://127.0.0.1:$PORT/moved" "http://127.0.0.1:$PORT/number/$i"
done
kill -HUP $server; sleep 0.5
curl -s "http://127.0.0.1:$PORT/small"
kill -QUIT $server; wait $server; echo "ended with $?"
