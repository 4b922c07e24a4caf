// gopeer is one end of a yamux session by hashicorp's library, for the interoperability tests.
//
// It connects to -connect and takes the yamux role -role. Streams that the other side opens begin with one line that
// says what to do with them (see serve). Commands arrive on standard input, one JSON object a line; each is answered by
// one JSON object with the same id on standard output (see run).
package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

type command struct {
	ID    int    `json:"id"`
	Op    string `json:"op"`
	Line  string `json:"line"`  // first line of the streams to open
	Size  int64  `json:"size"`  // bytes to send on each
	Count int    `json:"count"` // streams to open
}

type peer struct {
	session *yamux.Session
	release chan struct{} // closed by the command "release": stalled streams go on
	written atomic.Int64  // bytes written by the command "push"
	outLock sync.Mutex
	out     *json.Encoder
}

// randomReader gives fast pseudorandom bytes from a random seed.
func randomReader() io.Reader {
	var seed [32]byte
	if _, err := rand.Read(seed[:]); err != nil {
		panic(err)
	}
	return mathrand.NewChaCha8(seed)
}

// sendRandom writes size random bytes and returns their SHA-256.
func sendRandom(w io.Writer, size int64) (string, error) {
	sum := sha256.New()
	buffer := make([]byte, 256*1024)
	_, err := io.CopyBuffer(struct{ io.Writer }{w}, io.TeeReader(io.LimitReader(randomReader(), size), sum), buffer)
	return hex.EncodeToString(sum.Sum(nil)), err
}

func readLine(r io.Reader) (string, error) {
	var line []byte
	one := make([]byte, 1)
	for len(line) < 100 {
		if _, err := io.ReadFull(r, one); err != nil {
			return "", err
		}
		if one[0] == '\n' {
			return string(line), nil
		}
		line = append(line, one[0])
	}
	return "", fmt.Errorf("line too long")
}

// serve does what the first line of a stream asks for.
func (p *peer) serve(stream *yamux.Stream) error {
	line, err := readLine(stream)
	if err != nil {
		return err
	}
	words := strings.Fields(line)
	switch words[0] {
	case "echo": // send back what comes, then FIN
		if _, err := io.Copy(stream, stream); err != nil {
			return err
		}
		return stream.Close()
	case "sink": // read to the end, then answer "BYTES SHA256"
		sum := sha256.New()
		n, err := io.Copy(sum, stream)
		if err != nil {
			return err
		}
		fmt.Fprintf(stream, "%d %x", n, sum.Sum(nil))
		return stream.Close()
	case "reverse": // read to the end, then send everything back to front
		data, err := io.ReadAll(stream)
		if err != nil {
			return err
		}
		for i, j := 0, len(data)-1; i < j; i, j = i+1, j-1 {
			data[i], data[j] = data[j], data[i]
		}
		if _, err := stream.Write(data); err != nil {
			return err
		}
		return stream.Close()
	case "source": // send N random bytes and their SHA-256 in hexadecimal, FIN
		size, err := strconv.ParseInt(words[1], 10, 64)
		if err != nil {
			return err
		}
		sum, err := sendRandom(stream, size)
		if err != nil {
			return err
		}
		if _, err := io.WriteString(stream, sum); err != nil {
			return err
		}
		return stream.Close()
	case "stall": // read nothing until released, then like sink
		<-p.release
		sum := sha256.New()
		n, err := io.Copy(sum, stream)
		if err != nil {
			return err
		}
		fmt.Fprintf(stream, "%d %x", n, sum.Sum(nil))
		return stream.Close()
	case "finfirst": // FIN at once, then read to the end; the sum goes out on a new stream
		if err := stream.Close(); err != nil {
			return err
		}
		sum := sha256.New()
		n, err := io.Copy(sum, stream)
		if err != nil {
			return err
		}
		report, err := p.session.OpenStream()
		if err != nil {
			return err
		}
		fmt.Fprintf(report, "report\n%d %x", n, sum.Sum(nil))
		return report.Close()
	}
	return fmt.Errorf("unknown line %q", line)
}

// request opens a stream, sends the line and size random bytes while reading, then FIN; returns both sums and the answer.
func (p *peer) request(line string, size int64) (sent string, received string, answer []byte, err error) {
	stream, err := p.session.OpenStream()
	if err != nil {
		return "", "", nil, err
	}
	if _, err = io.WriteString(stream, line+"\n"); err != nil {
		return "", "", nil, err
	}
	sum := sha256.New()
	var head bytes.Buffer
	done := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.MultiWriter(sum, &limited{&head, 200}), stream)
		done <- err
	}()
	if sent, err = sendRandom(stream, size); err != nil {
		return "", "", nil, err
	}
	if err = stream.Close(); err != nil {
		return "", "", nil, err
	}
	err = <-done
	return sent, hex.EncodeToString(sum.Sum(nil)), head.Bytes(), err
}

// limited keeps the first left bytes and swallows the rest.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(data []byte) (int, error) {
	keep := min(len(data), l.left)
	l.left -= keep
	if _, err := l.w.Write(data[:keep]); err != nil {
		return 0, err
	}
	return len(data), nil
}

// run executes one command.
func (p *peer) run(c command) map[string]any {
	result := map[string]any{"id": c.ID}
	var err error
	switch c.Op {
	case "ping":
		var rtt time.Duration
		rtt, err = p.session.Ping()
		result["rtt"] = rtt.Seconds()
	case "request": // count streams at the same time
		sums := make([]map[string]any, c.Count)
		errs := make(chan error, c.Count)
		for i := range sums {
			go func() {
				sent, received, answer, err := p.request(c.Line, c.Size)
				sums[i] = map[string]any{"sent": sent, "received": received, "answer": strings.ToValidUTF8(string(answer), "?")}
				errs <- err
			}()
		}
		for range sums {
			if e := <-errs; e != nil {
				err = e
			}
		}
		result["streams"] = sums
	case "push": // write without end in the background; "written" tells how far it came
		var stream *yamux.Stream
		if stream, err = p.session.OpenStream(); err == nil {
			go func() {
				block := make([]byte, 1000)
				for {
					n, err := stream.Write(block)
					p.written.Add(int64(n))
					if err != nil {
						return
					}
				}
			}()
		}
	case "written":
		result["bytes"] = p.written.Load()
	case "streams":
		result["count"] = p.session.NumStreams()
	case "release":
		close(p.release)
	case "goaway":
		err = p.session.GoAway()
	case "close":
		err = p.session.Close()
	default:
		err = fmt.Errorf("unknown command %q", c.Op)
	}
	if err != nil {
		result["error"] = err.Error()
	}
	return result
}

func (p *peer) reply(result map[string]any) {
	p.outLock.Lock()
	defer p.outLock.Unlock()
	if err := p.out.Encode(result); err != nil {
		fmt.Fprintln(os.Stderr, "reply:", err)
	}
}

func main() {
	connect := flag.String("connect", "", "address to connect to")
	role := flag.String("role", "client", "yamux role: client or server")
	window := flag.Uint("window", 256*1024, "MaxStreamWindowSize")
	closeTimeout := flag.Duration("close-timeout", 5*time.Minute, "StreamCloseTimeout")
	keepalive := flag.Duration("keepalive", 30*time.Second, "KeepAliveInterval")
	flag.Parse()

	conn, err := net.Dial("tcp", *connect)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	config := yamux.DefaultConfig()
	config.MaxStreamWindowSize = uint32(*window)
	config.StreamCloseTimeout = *closeTimeout
	config.KeepAliveInterval = *keepalive
	open := yamux.Client
	if *role == "server" {
		open = yamux.Server
	}
	session, err := open(conn, config)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	p := &peer{session: session, release: make(chan struct{}), out: json.NewEncoder(os.Stdout)}

	go func() {
		for {
			stream, err := session.AcceptStream()
			if err != nil {
				p.reply(map[string]any{"id": 0, "ended": err.Error()})
				return
			}
			go func() {
				if err := p.serve(stream); err != nil {
					p.reply(map[string]any{"id": 0, "stream": stream.StreamID(), "failed": err.Error()})
				}
			}()
		}
	}()

	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var c command
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			fmt.Fprintln(os.Stderr, "command:", err)
			os.Exit(1)
		}
		go func() { p.reply(p.run(c)) }()
	}
}
