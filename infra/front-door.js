// The function of the front door, a CloudFront distribution: sends a request for `/<name>/...` to the MicroVM of the sandbox with this name.
//
// The KeyValueStore has the host of the MicroVM's endpoint and an access token for it. Requests go to no other hosts than endpoints of
// MicroVMs, so this is no open proxy, and a token reaches nothing else. The token guards the endpoint only; the agent server behind it
// requires its own session key. CloudFormation replaces the name of the region.
import cf from 'cloudfront';

const routes = cf.kvs();
const PATH = /^\/((?:[0-9a-f]{12}-)?[0-9a-f]{32})(\/.*)?$/;
const HOST = /^[a-z0-9-]{1,63}\.lambda-microvm\.${AWS::Region}\.on\.aws$/;
const PORT = '8000';

function refusal(request, status, text) {
  const origin = request.headers.origin;
  return {
    statusCode: status,
    statusDescription: text,
    headers: {
      'access-control-allow-origin': { value: origin ? origin.value : '*' },
      'cache-control': { value: 'no-store' },
      'content-type': { value: 'text/plain' },
      'retry-after': { value: '2' },
    },
    body: text,
  };
}

async function handler(event) {
  const request = event.request;
  const found = PATH.exec(request.uri);
  if (!found) {
    return refusal(request, 404, 'Not Found');
  }
  let host, token;
  try {
    host = await routes.get('host/' + found[1]);
    token = await routes.get('token/' + found[1]);
  } catch (missing) {
    return refusal(request, 503, 'The sandbox does not run');
  }
  if (!HOST.test(host)) {
    return refusal(request, 502, 'Bad Gateway');
  }
  request.uri = found[2] || '/';
  // All sandboxes share the host of the front door, and so their cookies.
  request.cookies = {};
  for (const name in request.headers) {
    if (name.startsWith('x-aws-proxy-')) {
      delete request.headers[name];
    }
  }
  // What is not given here is taken from the distribution's origin.
  cf.updateRequestOrigin({
    domainName: host,
    hostHeader: host,
    customHeaders: { 'x-aws-proxy-auth': token, 'x-aws-proxy-port': PORT },
    customOriginConfig: { port: 443, protocol: 'https', sslProtocols: ['TLSv1.2'] },
    timeouts: { connectionTimeout: 10, readTimeout: 120, keepAliveTimeout: 60 },
  });
  return request;
}
