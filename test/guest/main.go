// Command guest is the one program inside the test images besides busybox: it
// does what a shell cannot do precisely, one verb per need. It is static and
// speaks through its output and its exit code; see usage.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const usage = `usage: guest VERB [ARGUMENT]
  http ADDRESS TEXT      serve TEXT at every path until a signal comes
  signals                print "got SIGNAL" for each signal; exit 0 at the second
  stubborn               ignore every signal that can be ignored
  lines COUNT MICROS     print "line N" COUNT times (0: for ever), one each MICROS
  flood BYTES WIDTH      print BYTES bytes in lines of WIDTH (0: no newline)
  eat MEBIBYTES          hold that much memory, then print "full" and wait
  socket FAMILY          open a socket of that numeric family: "ok" or the error
  listen PORT            bind a TCP port: "ok" or the error, then exit
  ids                    print the real, effective and supplementary IDs
  detach SECONDS         leave a child behind that keeps stdout open
  exit CODE              exit with CODE
`

func main() {
	if len(os.Args) < 2 {
		fail(2, usage)
	}
	arg := func(i int) string {
		if len(os.Args) <= i+1 {
			fail(2, usage)
		}
		return os.Args[i+1]
	}
	number := func(i int) int {
		n, err := strconv.Atoi(arg(i))
		if err != nil {
			fail(2, err.Error())
		}
		return n
	}
	switch os.Args[1] {
	case "http":
		serve(arg(1), arg(2))
	case "signals":
		signals()
	case "stubborn":
		signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2)
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "lines":
		lines(number(1), time.Duration(number(2))*time.Microsecond)
	case "flood":
		flood(number(1), number(2))
	case "eat":
		eat(number(1))
	case "socket":
		fd, err := unix.Socket(number(1), unix.SOCK_SEQPACKET, 0)
		if err == unix.ESOCKTNOSUPPORT || err == unix.EPROTONOSUPPORT {
			fd, err = unix.Socket(number(1), unix.SOCK_STREAM, 0)
		}
		if err != nil {
			fmt.Println(unix.ErrnoName(err.(unix.Errno)))
			return
		}
		_ = unix.Close(fd)
		fmt.Println("ok")
	case "listen":
		l, err := net.Listen("tcp", ":"+arg(1))
		if err != nil {
			fail(1, err.Error())
		}
		_ = l.Close()
		fmt.Println("ok")
	case "ids":
		groups, err := os.Getgroups()
		if err != nil {
			fail(1, err.Error())
		}
		fmt.Println("uid", os.Getuid(), "euid", os.Geteuid(), "gid", os.Getgid(), "groups", groups)
	case "detach":
		detach(number(1))
	case "exit":
		os.Exit(number(1))
	default:
		fail(2, usage)
	}
}

func fail(code int, text string) {
	fmt.Fprintln(os.Stderr, strings.TrimSpace(text))
	os.Exit(code)
}

func serve(address, text string) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		fail(1, err.Error())
	}
	host, err := os.Hostname()
	if err != nil {
		fail(1, err.Error())
	}
	fmt.Println("serving on", l.Addr())
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)
	go func() {
		<-stop
		fmt.Println("stopping")
		os.Exit(0)
	}()
	err = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		fmt.Fprintf(w, "%s from %s\n", text, host)
		fmt.Println("request", q.URL.Path)
	}))
	fail(1, err.Error())
}

func signals() {
	c := make(chan os.Signal, 8)
	signal.Notify(c, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2)
	fmt.Println("ready")
	for range 2 {
		s := <-c
		fmt.Println("got", unix.SignalName(s.(syscall.Signal)))
		if s == unix.SIGTERM {
			os.Exit(0)
		}
	}
}

func lines(count int, pause time.Duration) {
	for i := 1; count == 0 || i <= count; i++ {
		if _, err := fmt.Println("line", i); err != nil {
			os.Exit(1)
		}
		if pause > 0 {
			time.Sleep(pause)
		}
	}
}

func flood(n, width int) {
	w := bufio.NewWriterSize(os.Stdout, 1<<16)
	for i := 1; i <= n; i++ {
		c := byte('a' + i%26)
		if width > 0 && i%width == 0 {
			c = '\n'
		}
		if err := w.WriteByte(c); err != nil {
			os.Exit(1)
		}
	}
	if err := w.Flush(); err != nil {
		os.Exit(1)
	}
}

func eat(mebibytes int) {
	var held [][]byte
	for range mebibytes {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		held = append(held, b)
	}
	fmt.Println("full")
	time.Sleep(time.Hour)
	_ = held
}

// detach starts a child that holds stdout and stderr and outlives its parent.
func detach(seconds int) {
	p, err := os.StartProcess("/proc/self/exe", []string{"guest", "lines", "0", strconv.Itoa(seconds * 1e6)}, &os.ProcAttr{
		Files: []*os.File{nil, os.Stdout, os.Stderr}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		fail(1, err.Error())
	}
	_ = p.Release()
	_, _ = io.WriteString(os.Stdout, "detached\n")
}
