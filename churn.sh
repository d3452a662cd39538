end=$((SECONDS+$1))
while [ $SECONDS -lt $end ]; do for i in 1 2 3; do ip link add chv$i type veth peer name chw$i; ip addr add 10.99.$i.1/24 dev chv$i; ip link set chv$i up; ip link set chw$i up; done; for i in 1 2 3; do ip link del chv$i; done; done
