# needs: /usr/bin/openssl (openssl)
head -c 200000 /bin/bash > in
for digest in md5 sha1 sha256 sha512 sha3-256 blake2b512 sm3; do $RUN openssl dgst -$digest in; done
for cipher in aes-128-cbc aes-256-ctr chacha20 camellia-256-cbc aria-128-cbc; do
    $RUN openssl enc -$cipher -pbkdf2 -pass pass:word -nosalt -in in -out out && $RUN openssl enc -d -$cipher -pbkdf2 -pass pass:word -nosalt -in out | cmp - in && cksum < out
done
$RUN openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out key 2> /dev/null
$RUN openssl pkey -in key -pubout -out public
$RUN openssl dgst -sha256 -sign key -out signature in && $RUN openssl dgst -sha256 -verify public -signature signature in
$RUN openssl genpkey -algorithm ED25519 -out edkey && $RUN openssl pkeyutl -sign -inkey edkey -rawin -in public -out edsignature && wc -c < edsignature
$RUN openssl req -x509 -new -key key -subj /CN=localhost -days 1 -out certificate && $RUN openssl x509 -in certificate -noout -subject
$RUN openssl prime 2147483647
$RUN openssl speed -seconds 1 -bytes 8192 sha256 > /dev/null 2>&1 && echo "speed: done"
