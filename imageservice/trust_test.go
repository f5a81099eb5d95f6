package imageservice

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	mathbig "math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// authority signs certificates for the tests.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  string
}

func mustKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, key: mustKey(t)}
	template := &x509.Certificate{
		SerialNumber: mathbig.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pem = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return a
}

// issue returns a certificate and its key for 127.0.0.1.
func (a *authority) issue() (cert, key string) {
	a.t.Helper()
	k := mustKey(a.t)
	template := &x509.Certificate{
		SerialNumber: mathbig.NewInt(time.Now().UnixNano()), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &k.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
}

// secure is the node's registry over TLS, for clients with a certificate of ca.
func secure(n *node, ca *authority, wrap func(http.Handler) http.Handler) (host string) {
	n.t.Helper()
	cert, key := ca.issue()
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		n.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	srv := httptest.NewUnstartedServer(wrap(n.reg))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	srv.EnableHTTP2 = true
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	n.t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "https://")
}

// TestHostsTLS: certificates, headers, paths and the namespace of a hosts.toml reach the
// server, and certs.d serves a registry that has none.
func TestHostsTLS(t *testing.T) {
	n := newNode(t)
	n.reg.Push("r", "v1", big(t, 1, 2))
	ca := newAuthority(t)
	var mu sync.Mutex
	var asked []*http.Request
	host := secure(n, ca, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			mu.Lock()
			asked = append(asked, q.Clone(context.Background()))
			mu.Unlock()
			q.URL.Path = strings.Replace(q.URL.Path, "/odd/place/", "/v2/", 1)
			h.ServeHTTP(w, q)
		})
	})
	cert, key := ca.issue()
	dir := filepath.Join(n.mustMkdir("hosts.d"), "img.example")
	n.hostsFor("img.example", fmt.Sprintf(`
[host."https://%s/odd/place"]
  override_path = true
  ca = "ca.pem"
  client = [["me.pem", "me.key"]]
  [host."https://%s/odd/place".header]
    x-token = "let me in"
`, host, host))
	for name, text := range map[string]string{"ca.pem": ca.pem, "me.pem": cert, "me.key": key} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	img := n.mustPull("img.example/r:v1")
	mu.Lock()
	for _, q := range asked {
		if q.Header.Get("x-token") != "let me in" || !strings.HasPrefix(q.URL.Path, "/odd/place/r/") || q.URL.Query().Get("ns") != "img.example" || q.ProtoMajor != 2 {
			t.Errorf("asked %s with %v", q.URL, q.Header)
		}
	}
	mu.Unlock()
	e := n.mustExplain("img.example/r:v1", true).Candidates[0].Endpoints[0]
	if e.Probe == nil || !e.Probe.OK || len(e.CAFiles) != 1 || e.CAFiles[0] != filepath.Join(dir, "ca.pem") || e.ClientFiles[0].Key != filepath.Join(dir, "me.key") ||
		len(e.Headers) != 1 || e.Headers[0] != "X-Token" {
		t.Errorf("explained as %+v, probe %+v", e, e.Probe)
	}
	// The same server by its own name, with what certs.d has for it.
	if _, err := n.Pull(context.Background(), host+"/r:v1", nil); !errors.Is(err, ErrRegistryUnavailable) {
		t.Errorf("without certificates: %v", err)
	}
	certs := n.mustMkdir("certs.d/" + host)
	for name, text := range map[string]string{"ca.crt": ca.pem, "me.cert": cert, "me.key": key} {
		if err := os.WriteFile(filepath.Join(certs, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if again := n.mustPull(host + "/r:v1"); again.ID != img.ID {
		t.Errorf("image %s, want %s", again.ID, img.ID)
	}
	e = n.mustExplain(host+"/r:v1", false).Candidates[0].Endpoints[0]
	if e.SkipVerify || len(e.CAFiles) != 1 || len(e.ClientFiles) != 1 {
		t.Errorf("explained as %+v", e)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Pull(context.Background(), "img.example/r:v1", nil); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "ca.pem")) {
		t.Errorf("broken CA file: %v", err)
	}
}

// signed puts sigstore's attachment for an image in front of a registry.
type signed struct {
	manifests, blobs map[string][]byte // by tag or digest
}

func (s *signed) ServeHTTP(w http.ResponseWriter, q *http.Request) bool {
	name := q.URL.Path[strings.LastIndex(q.URL.Path, "/")+1:]
	if b, ok := s.manifests[name]; ok {
		w.Header().Set("Content-Type", ociManifestType)
		_, _ = w.Write(b)
		return true
	}
	if b, ok := s.blobs[name]; ok {
		_, _ = w.Write(b)
		return true
	}
	return false
}

// sign makes the attachment with which key says that name has the manifest.
func sign(t *testing.T, key *ecdsa.PrivateKey, name, manifest string) *signed {
	t.Helper()
	payload := fmt.Sprintf(`{"critical":{"identity":{"docker-reference":%q},"image":{"docker-manifest-digest":%q},"type":"cosign container image signature"},"optional":null}`, name, manifest)
	sum := sha256.Sum256([]byte(payload))
	sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	config := `{"architecture":"","os":"","config":{},"rootfs":{"type":"layers","diff_ids":[]}}`
	m, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": ociManifestType,
		"config": map[string]any{"mediaType": ociConfigType, "digest": digest.FromString(config), "size": len(config)},
		"layers": []any{map[string]any{
			"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": digest.FromString(payload), "size": len(payload),
			"annotations": map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(sig)},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &signed{
		manifests: map[string][]byte{strings.Replace(manifest, ":", "-", 1) + ".sig": m},
		blobs:     map[string][]byte{digest.FromString(payload).String(): []byte(payload)},
	}
}

// TestSigstore: the policy's signatures are looked for where the image comes from.
func TestSigstore(t *testing.T) {
	n := newNode(t)
	img := sample(t, "x")
	n.reg.Push("r", "v1", img)
	good, other := mustKey(t), mustKey(t)
	der, err := x509.MarshalPKIXPublicKey(&good.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	pub := n.mustWrite("key.pub", string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	n.mustWrite("policy.json", fmt.Sprintf(`{"default":[{"type":"reject"}],"transports":{"docker":{"":[
		{"type":"sigstoreSigned","keyPath":%q,"signedIdentity":{"type":"matchRepository"}}]}}}`, pub))
	n.mustWrite("registries.d/all.yaml", "default-docker:\n  use-sigstore-attachments: true\n")
	ca := newAuthority(t)
	cert, key := ca.issue()
	files := map[string]string{"ca": n.mustWrite("ca.pem", ca.pem), "me": n.mustWrite("me.pem", cert+key)}
	var s *signed
	host := secure(n, ca, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if !s.ServeHTTP(w, q) {
				h.ServeHTTP(w, q)
			}
		})
	})
	for _, tc := range []struct {
		name string
		by   func(name string) *signed
		want error
	}{
		{"right key", func(name string) *signed { return sign(t, good, name, img.Digest) }, nil},
		{"other key", func(name string) *signed { return sign(t, other, name, img.Digest) }, ErrPolicyRejected},
		{"other image", func(name string) *signed { return sign(t, good, "other.example/r", img.Digest) }, ErrPolicyRejected},
		{"no signature", func(string) *signed { return &signed{} }, ErrPolicyRejected},
	} {
		for _, by := range []string{"own name", "hosts.toml", "hosts.toml with TLS", "registries.conf"} {
			t.Run(tc.name+" by "+by, func(t *testing.T) {
				m := mirrorOf(n, func(_ *mirror, w http.ResponseWriter, q *http.Request) bool { return s.ServeHTTP(w, q) })
				name := m.host + "/r"
				n.mustWrite("registries.conf", "#")
				switch by {
				case "hosts.toml":
					name = "img.example/r"
					n.hostsFor("img.example", fmt.Sprintf("[host.\"http://%s\"]\n[host.\"http://127.0.0.1:1\"]", m.host))
				case "hosts.toml with TLS":
					name = "tls.example/r"
					n.hostsFor("tls.example", fmt.Sprintf("[host.\"https://%s\"]\nca=%q\nclient=%q", host, files["ca"], files["me"]))
				case "registries.conf":
					name = "two.example/r"
					n.mustWrite("registries.conf", fmt.Sprintf("[[registry]]\nlocation=\"two.example\"\n[[registry.mirror]]\nlocation=%q\ninsecure=true\n", m.host))
				}
				s = tc.by(name)
				_, err := n.Pull(context.Background(), name+":v1", nil)
				if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
					t.Errorf("got %v, want %v", err, tc.want)
				}
			})
		}
	}
}
